"""Where the dry run finds stages in networks of timm, beside what timm declares of them: ``python benchmarks/dry_run.py [NAME ...]``."""

from __future__ import annotations

import sys

import timm

from flowdistill.models.survey import survey

NAMES = (
    *("resnet34", "resnet50", "resnet50d", "resnetv2_50", "regnety_002", "repvgg_a0", "densenet121", "vgg11_bn", "xception41"),
    *("mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0", "ghostnet_100", "hrnet_w18_small", "convnext_atto"),
    *("vit_tiny_patch16_224", "deit3_small_patch16_224", "swin_tiny_patch4_window7_224", "mixer_s32_224", "xcit_nano_12_p16_224"),
    *("levit_128s", "maxvit_nano_rw_256", "coatnet_nano_rw_224", "pvt_v2_b0", "tiny_vit_5m_224", "edgenext_xx_small", "mobilevit_xxs"),
    *("poolformer_s12", "fastvit_t8", "efficientvit_b0"),
)


def main(names: list[str]) -> None:
    equal = 0
    for name in names:
        net = timm.create_model(name, num_classes=10)
        size = net.default_cfg["input_size"][1]
        declared = {found["reduction"]: found["num_chs"] for found in net.feature_info}
        ours = {round(size / tap.height): tap.channels for tap in survey(net, 3, size, size).taps}
        equal += declared == ours
        print(f"{name}: {'equal' if declared == ours else f'declared {declared}, found'} {ours}", flush=True)
    print(f"{equal} of {len(names)} networks: the same channels at the same strides")


if __name__ == "__main__":
    main(sys.argv[1:] or list(NAMES))
