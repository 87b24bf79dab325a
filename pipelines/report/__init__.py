"""The report of a run: one page that says what every model reached and what it cost.

report.py is the stage, findings.py what its inputs say, page.py turns sections into HTML and
Markdown, and compare.py puts several runs on one page.
"""
