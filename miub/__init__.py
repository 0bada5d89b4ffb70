"""Upper bounds on the mutual information between a layer's base and adapter outputs.

The monitor, its callback and the estimators are not part of this release yet.
"""
