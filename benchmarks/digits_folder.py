"""scikit-learn's digits as image files: FOLDER/train/CLASS/NUMBER.png and FOLDER/test/CLASS/NUMBER.png, the first half for training.

python benchmarks/digits_folder.py FOLDER [--size 64] [--channels 3] [--images 1797]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, choices=(1, 3), default=3)
    parser.add_argument("--images", type=int, help="the first so many; left out, all")
    given = parser.parse_args(words)
    digits = load_digits()
    images, labels = digits.images[: given.images], digits.target[: given.images]
    half = len(labels) // 2
    for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = given.folder / ("train" if number < half else "test") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray((pixels * 15).astype(np.uint8))
        image = small.resize((given.size, given.size), Image.Resampling.BICUBIC)
        image.convert("RGB" if given.channels == 3 else "L").save(place / f"{number:04}.png")
    print(f"{half} training and {len(labels) - half} test images of {given.size}x{given.size} in {given.folder}")


if __name__ == "__main__":
    main()
