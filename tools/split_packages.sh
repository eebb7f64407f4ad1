#!/bin/sh
# For the image's build: drop what never runs there, and move torch to /opt/torch, for a layer of its own.
set -eu
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
rm -rf "$site"/pip "$site"/pip-*.dist-info /opt/venv/bin/pip*
rm -rf "$site"/torch/include "$site"/torch/share "$site"/torch/test
find "$site/torch/bin" -mindepth 1 -maxdepth 1 ! -name torch_shm_manager -exec rm -rf {} +  # its own tests, protoc
for name in sympy networkx scipy sklearn matplotlib; do
    find "$site/$name" -type d -name tests -prune -exec rm -rf {} +
done
# Static libraries; and 250 MB of CUDA's that no other library names, nor code of ours.
find "$site" \( -name '*.a' -o -name 'libcusolverMg.so.*' -o -name 'libnvrtc*.alt.so.*' -o -name 'libnvshmem_device.bc' \) -delete
mkdir -p /opt/torch
for name in torch nvidia triton; do
    if [ -d "$site/$name" ]; then mv "$site/$name" /opt/torch/; fi
done
echo /opt/torch > "$site/torch.pth"
python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
python -c 'import diffusers, matplotlib.figure, sklearn.decomposition; diffusers.AutoencoderKL'
