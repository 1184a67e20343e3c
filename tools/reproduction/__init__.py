"""What `tools/reproduce.py` is made of: cells (one model each), how they are filled, and the tables that show them."""
