"""LLaVA's own data set, run by data_path.py in LLaVA's environment.

Reads one line of JSON with what to read from its standard input, and then passes over all records once for every line
that follows, answering each with its own processor seconds so far.
"""

import json
import sys
import time


def main() -> None:
    say, sys.stdout = sys.stdout, sys.stderr  # what LLaVA prints is no answer
    given = json.loads(sys.stdin.readline())
    sys.path.insert(0, given["source"])
    import torch
    import transformers
    from llava import conversation
    from llava.train.train import DataArguments, LazySupervisedDataset

    torch.set_num_threads(1)
    conversation.default_conversation = conversation.conv_templates["v1"]
    # As its train() makes it: AutoTokenizer with use_fast=False is this class for Vicuna.
    tokenizer = transformers.LlamaTokenizer(given["tokenizer"], model_max_length=2048, padding_side="right")
    tokenizer.pad_token = tokenizer.unk_token
    settings = DataArguments(
        data_path=given["records"], lazy_preprocess=True, is_multimodal=True, image_folder=given["images"]
    )
    settings.image_aspect_ratio = "pad"
    settings.mm_use_im_start_end = False
    side = given["side"]
    settings.image_processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    dataset = LazySupervisedDataset(given["records"], tokenizer, settings)
    say.write(f"transformers {transformers.__version__}\n")
    say.flush()
    for _ in sys.stdin:
        for index in range(given["count"]):
            dataset[index]
        say.write(f"{time.process_time()}\n")
        say.flush()


if __name__ == "__main__":
    main()
