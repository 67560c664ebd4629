# Muon for the matrices of the blocks. Not in the paper:
#   for v in vanilla kv; do for s in 1 2 3; do
#     python train.py config/shakespeare_char_cpu.py config/compare/$v.py config/compare/muon.py --seed=$s \
#       --out_dir=out/compare/shakespeare-muon-$v-$s
#   done; done
#   python plot.py out/compare/shakespeare-muon-{vanilla,kv}-*
optimizer = "muon"
