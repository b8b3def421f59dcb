"""`make torment`: the product among a bank in its worst mood and processes that die, and then the books side by side.

Everything runs on this machine in a folder of its own: see `ops.stage`.
"""
