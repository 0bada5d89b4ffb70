"""What a resumed run takes up, and what must agree for it to continue another."""
