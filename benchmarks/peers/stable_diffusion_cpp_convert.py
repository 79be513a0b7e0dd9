"""A diffusers folder as stable-diffusion.cpp loads it: FOLDER NEW. Links; CLIP's names get the prefix of before."""

import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file

folder, new = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
for part in ("unet", "vae"):
    (new / part).mkdir(parents=True)
    (new / part / "diffusion_pytorch_model.safetensors").symlink_to(
        folder / part / "diffusion_pytorch_model.safetensors"
    )
(new / "text_encoder").mkdir()
tensors = load_file(folder / "text_encoder/model.safetensors")
tensors = {"text_model." + name.removeprefix("text_model."): value for name, value in tensors.items()}
save_file(tensors, new / "text_encoder/model.safetensors", {"format": "pt"})
