"""What the rows and photos of a project show before anything is trained.

`explore` is the whole of it: it collects what the modules below find of a project's rows
(`sentences`, `kinds`, `words`, `baseline`) and photos (`photos`, `duplicates`), and writes one
JSON file, one PNG a figure (`figures`) and one page (`report`).
"""
