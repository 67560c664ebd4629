# Only values are shifted. Figure 8b; the loop is in k_only.py.
kv_shift = "v"
