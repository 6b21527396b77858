"""What stands on the page of a run, and on that of several compared.

`measured` has the figures, `cost` what they cost, `embedding` the map of the rows, `drawings`
makes figures of them, `cards` the errors to look at; `run_page` and `compare_page` write.
"""
