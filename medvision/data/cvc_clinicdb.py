"""CVC-ClinicDB: polyps in colonoscopy frames (Bernal et al. 2015, doi:10.1016/j.compmedimag.2015.02.007)."""

import re
from bisect import bisect_left
from collections import defaultdict
from dataclasses import replace

from medvision.data.base import ImageDataModule, Splits
from medvision.data.drawing import polyps
from medvision.data.drawing.polyps import LAST_FRAMES
from medvision.data.phantom import Drawing
from medvision.data.source import Member

FILE = re.compile(r"(?:^|/)(original|ground truth)/0*(\d+)\.(png|tiff?)$", re.IGNORECASE)
METADATA = re.compile(r"(?:^|/)metadata\.csv$", re.IGNORECASE)


class CVCClinicDB(ImageDataModule):
    """612 frames of 29 sequences, as PNG or TIF; a sequence is never torn apart, since its frames look alike."""

    page = "https://polyp.grand-challenge.org/CVCClinicDB/"
    drawing = Drawing(
        polyps.VERSION, polyps.write_cvc_clinicdb, lambda images: {"sequences": max(1, images // 3), "frames": 3}
    )

    def index(self) -> Splits:
        """Pairs frames and masks by number."""
        files: dict[tuple[str, str], list[Member]] = defaultdict(list)
        for member in self.source("CVC-ClinicDB").members():
            match = FILE.search(member.name)
            files[(match[1].lower(), match[3][:3].lower()) if match else ("", "")].append(member)
        self.stray(files[("", "")], ignore=METADATA)
        ending = "png" if files["original", "png"] else "tif"  # some archives hold all frames in both
        images, masks = (
            self.by_id(files[kind, ending], re.compile(r"/0*(\d+)\.\w+$")) for kind in ("original", "ground truth")
        )
        samples = self.pair("train", images, masks, official=LAST_FRAMES[-1])
        if beyond := [s.id for s in samples if not 1 <= int(s.id) <= LAST_FRAMES[-1]]:
            self.problem("error", f"frames beyond {LAST_FRAMES[-1]}", beyond, "They belong to no known sequence")
        return {"train": [replace(s, group=f"sequence {1 + bisect_left(LAST_FRAMES, int(s.id))}") for s in samples]}
