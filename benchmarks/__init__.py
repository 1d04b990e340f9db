"""Programs that measure, by question, and what writes the reports from their data; see README.md."""
