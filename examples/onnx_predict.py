"""An exported run with onnxruntime alone: python onnx_predict.py model.onnx image.jpg mask.png"""

import json
import sys

import cv2
import numpy as np
import onnxruntime

model, source, *target = sys.argv[1:]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
facts = json.loads(session.get_modelmeta().custom_metadata_map["medvision"])

grey = facts["channels"] == 1
image = cv2.imread(source, cv2.IMREAD_GRAYSCALE)[..., None] if grey else cv2.imread(source)[..., ::-1]
height, width = facts["size"]
shrinks = height <= image.shape[0] and width <= image.shape[1]
small = cv2.resize(np.ascontiguousarray(image), (width, height), interpolation=cv2.INTER_AREA if shrinks else 1)
seen = (small.reshape(height, width, -1) / facts["input_range"][1] - facts["mean"]) / facts["std"]

(logits,) = session.run(None, {"image": seen.transpose(2, 0, 1)[None].astype(np.float32)})[0]
temperature = np.broadcast_to(facts["temperature"] or [1.0], len(logits))

for k, name in enumerate(facts["classes"]):
    if facts["target"] == "label":
        others = logits if facts["activation"] == "softmax" else np.array([logits[k], 0])
        print(f"{name}: {1 / np.exp((others - logits[k]) / temperature[k]).sum():.6f}")
    else:  # one picture for each class; facts["cleaning"] says what would be done with it
        probability = cv2.resize(1 / (1 + np.exp(-logits[k])), image.shape[1::-1])
        mask = 1 / (1 + (1 / probability - 1) ** (1 / temperature[k])) >= facts["threshold"][k]
        cv2.imwrite(target[k], mask * np.uint8(255))
