"""Families of backbones that become a plain ViT: for each source format one key map and one reading of its settings.

| source | families |
|---|---|
| `timm_vit` | DINOv2, DeiT-III, ViT augreg, MAE, SigLIP and SigLIP 2 of timm |
| `timm_eva` | DINOv3, EVA-02, Perception Encoder of timm |
| `transformers_dinov2` | DINOv2 with and without registers of Transformers |
| `transformers_dinov3` | DINOv3 of Transformers |
| `transformers_vit` | ViT and MAE of Transformers |
| `transformers_siglip` | SigLIP and SigLIP 2 of Transformers |
| `plain_vit` | this package's own |

BEiT is not among them: it adds a learned bias per head and pair of patches to the attention scores of every block,
which would need a float mask over all tokens, and so give up the fast attention kernels and masks on single rows.
"""
