"""Pages that compare runs: read them, test their differences, render Markdown and HTML."""
