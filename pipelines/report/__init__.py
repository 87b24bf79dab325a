"""The report of a run: one page with every model's results and costs.

report.py is the stage, findings.py reads its inputs, page.py writes sections as HTML and Markdown,
and compare.py puts several runs on one page.
"""
