"""The report of one or several experiments: `document` gathers, `page/` shows."""
