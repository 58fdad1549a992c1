"""The scores of sam/weights/tiny.md: python -m vfmk.tasks.score_tiny [--checkpoint FILE]

Unseen generated scenes, the demo's digits on photographs, and, where it is at hand (VFMK_DATA, or
../shared/data from the project's root), ISIC 2016: the first 50 stems tune the controls, the last
50 are scored.
"""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vfmk.data.demo_scenes import demo_scenes
from vfmk.data.folder import load_samples
from vfmk.data.sample import Sample
from vfmk.data.scenes import generate_scene
from vfmk.sam.load import load_sam
from vfmk.tasks.controls import controlled_score, mean_iou, predict_logits

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

UNSEEN_SEED = 1_000_000  # pretraining seeds lie below
DATA = Path(os.environ.get("VFMK_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))


def unseen_scenes(start: int, count: int) -> list[Sample]:
    """One object out of each of `count` scenes, with its deepest point."""
    samples = []
    for index in range(start, start + count):
        scene = generate_scene(UNSEEN_SEED, index)
        mask = scene.masks[index % len(scene.masks)]
        samples.append(Sample.with_deepest_point(f"scene-{index}", scene.image, mask))
    return samples


def bounding_box(mask: np.ndarray) -> np.ndarray:
    """float32 (x0, y0, x1, y1) of a bool mask [H, W]."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max(), y.max()], np.float32)


def score_tiny(sam: "Sam") -> dict[str, dict[str, float]]:
    """Mean IoU by data set, from one point unless it says box, with controls beside."""
    unseen = unseen_scenes(200, 400)
    boxed = [predict_logits(sam, s, bounding_box(s.mask)) > 0 for s in unseen]
    scores = {
        "generated scenes": controlled_score(sam, unseen_scenes(0, 200), unseen)._asdict(),
        "generated scenes, box": {"model": mean_iou(boxed, unseen)},
        "digits on photographs": controlled_score(
            sam, demo_scenes("train", 100), demo_scenes("held_out", 100)
        )._asdict(),
    }
    if (DATA / "isic2016").is_dir():
        lesions = load_samples(DATA / "isic2016")
        scores["ISIC 2016"] = controlled_score(sam, lesions[:50], lesions[-50:])._asdict()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="default: the bundled weights")
    args = parser.parse_args()
    print(json.dumps(score_tiny(load_sam("tiny", args.checkpoint)), indent=2))


if __name__ == "__main__":
    main()
