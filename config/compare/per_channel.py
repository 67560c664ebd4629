# A weight for each channel in place of each head: a short depthwise convolution, as a reviewer of the paper asked for.
# Not in the paper; the loop is in qkv.py.
shift_per = "channel"
