# Figures 5b and 5c, learning rates, constant after warm-up as in the paper, whose vanilla model diverges at 1e-2. Small
# models bear more:
#   for v in vanilla kv; do for r in 1e-4 1e-3 3e-3 1e-2 3e-2 1e-1; do for s in 1 2 3; do
#     python train.py config/shakespeare_char_cpu.py config/compare/$v.py config/compare/learning_rates.py \
#       --learning_rate=$r --seed=$s --out_dir=out/compare/shakespeare-rate-$r-$v-$s
#   done; done; done
#   python plot.py out/compare/shakespeare-rate-*-{vanilla,kv}-* --x=learning_rate
lr_schedule = "constant"
min_lr = 0.0
max_steps = 300
