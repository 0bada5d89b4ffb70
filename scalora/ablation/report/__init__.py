"""From plans and records to tables, pictures, a page and a JSON file."""
