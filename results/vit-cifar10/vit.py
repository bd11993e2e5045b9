"""A vision transformer of four blocks: 16 patches of 8 pixels of an image of 32 x 32, 96 features a patch."""

from timm.models.vision_transformer import VisionTransformer


class Small(VisionTransformer):
    def __init__(self, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__(img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, in_chans=in_chans, num_classes=num_classes)
