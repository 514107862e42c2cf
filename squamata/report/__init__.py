"""The laboratory: studies (grids of recipes), sensitivity, outlier channels, and the one page that shows them.

Nothing here knows the order of the pipeline: its verbs are handed in (``verbs.Verbs``).
"""
