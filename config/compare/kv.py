# The paper's KV shift: keys and values, two tokens, free scalars. Every comparison has it.
kv_shift = "kv"
