"""Train the student's tokenizer: python make_tokenizer.py OUT.json SIZE FILE.jsonl.gz ... (pairs or texts)."""

import gzip
import json
import os
import random
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

# Share of the rows that is read; set by the environment.
SHARE = float(os.environ.get("SHARE", "1"))
SPECIALS = ["<pad>", "<unk>", "<mask>", "<cls>", "<sep>"]


def build():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            # parseHTTPHeader2 → parse HTTP Header2; zero-width matches, so nothing is lost.
            normalizers.Replace(Regex(r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"), " "),
            normalizers.Replace("_", " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            # Letters, digits and runs of anything else are words of their own.
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}+|[^\p{L}\p{N}]{1,3}"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def texts(files, limit_chars):
    rng = random.Random(0)
    for file in files:
        with gzip.open(file, "rt") as lines:
            for line in lines:
                if rng.random() >= SHARE:
                    continue
                row = json.loads(line)
                # Descriptions are short, and queries are made of such words: they count three times.
                for text, times in ((row.get("description"), 3), (row.get("code") or row.get("text"), 1)):
                    if text:
                        for _ in range(times):
                            yield text[:limit_chars]


def train(target, size, files, limit_chars=1500):
    tokenizer = build()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=SPECIALS, limit_alphabet=300, min_frequency=3, show_progress=False
    )
    tokenizer.train_from_iterator(texts(files, limit_chars), trainer)
    # Without "added tokens" a text that holds "<mask>" is ordinary text: it is split at its brackets before the lookup.
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.save(target)
    return tokenizer


if __name__ == "__main__":
    tokenizer = train(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
    print(tokenizer.get_vocab_size(), [tokenizer.id_to_token(i) for i in range(5)])
