# A weight for each channel in place of each head, a short depthwise convolution. Not in the paper. The loop is in vanilla.py.
shift_per = "channel"
