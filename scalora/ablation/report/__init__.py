"""Tables, pictures, a page and a JSON file from plans and records.

Held by tests/ablation/test_ablate_command.py, test_ablation_tables.py and
test_ablation_pictures.py.
"""
