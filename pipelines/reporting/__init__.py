"""Parts of the report: a file for each section, and what the page is made of."""
