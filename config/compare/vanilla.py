# Without KV shift. Figure 5a, vanilla against KV shift over five seeds:
#   for v in vanilla kv; do for s in 1 2 3 4 5; do
#     python train.py config/shakespeare_char_cpu.py config/compare/$v.py --seed=$s --out_dir=out/compare/shakespeare-$v-$s
#   done; done
#   python plot.py out/compare/shakespeare-{vanilla,kv}-*
# Each file here is to follow one that says which corpus and model: put config/compare/pystdlib.py in its place (and pystdlib
# into out_dir) to have the comparison on another. The other loops are like this one. What is complete is not run again.
kv_shift = "none"
