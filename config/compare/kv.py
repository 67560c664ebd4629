# The paper's KV shift: keys and values, two tokens, free scalars. Every comparison has it; Figure 5a's loop is in vanilla.py.
kv_shift = "kv"
