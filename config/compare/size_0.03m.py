# 0.03M parameters without embeddings. Figure 7a, the loss over sizes:
#   for v in vanilla kv; do for n in 0.03m 0.1m 0.3m 0.8m 2.7m; do for s in 1 2 3; do
#     python train.py config/shakespeare_char_cpu.py config/compare/$v.py config/compare/size_$n.py --seed=$s \
#       --out_dir=out/compare/shakespeare-size-$n-$v-$s
#   done; done; done
#   python plot.py out/compare/shakespeare-size-*-{vanilla,kv}-* --x=parameters
n_layer = 2
n_head = 2
n_embd = 32
