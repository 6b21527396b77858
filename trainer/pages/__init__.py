"""Pages that people look at: one HTML file each, complete in itself.

`page` fills the templates of `templates/`, `drawing` makes the figures in them. What
stands on a page is collected where it is known: `trainer.results`, `trainer.tuning`.
"""
