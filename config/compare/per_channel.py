# A weight for each channel in place of each head, a short depthwise convolution. Not in the paper; the loop is in qkv.py.
shift_per = "channel"
