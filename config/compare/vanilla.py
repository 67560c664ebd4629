# Without KV shift. Figure 5a, vanilla against KV shift over five seeds:
#   for v in vanilla kv; do for s in 1 2 3 4 5; do python train.py config/compare/shakespeare.py config/compare/$v.py \
#     --seed=$s --out_dir=out/compare/shakespeare-$v-$s; done; done
#   python plot.py out/compare/shakespeare-{vanilla,kv}-*
kv_shift = "none"
