"""A study's report: one HTML file that needs nothing beside itself, and each of its figures as SVG and CSV.

draw.py makes a chart a drawing, html.py a study a page.
"""
