"""Record the results of haotian-liu/LLaVA's code for a folder.

test_convert_original.py runs this program in a separate process.

python convert_original_child.py FOLDER OUT IDS [BASE]
"""

import json
import sys

import torch


def main(folder, out, ids, base=None):
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(folder)
    tokenizer, model, processor, _ = load_pretrained_model(folder, base, name, device="cpu", device_map="cpu")
    model = model.float().eval()
    model.get_vision_tower().float()
    size = processor.crop_size["height"]
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([json.loads(ids)]), images=pixels).logits[0]
    texts = ["What is it?", "plain"]
    torch.save(
        {"logits": logits.float(), "ids": [tokenizer(t).input_ids for t in texts], "texts": texts,
         "clip": {k: v.float() for k, v in model.get_vision_tower().vision_tower.state_dict().items()}},
        out,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
