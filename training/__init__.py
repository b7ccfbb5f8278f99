"""The scripts, installed as `ecl_hf.training`, with their recipes and launch configurations beside them.

Each file is a script of its own, which imports none of the others: `python training/train.py ...` in a checkout,
`ecl-hf train ...` anywhere.
"""
