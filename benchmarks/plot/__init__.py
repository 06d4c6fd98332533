"""CSV and picture of the JSON files that the measuring suites wrote."""
