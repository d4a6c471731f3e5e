"""Part: write the model, and compress its fine-tune at each rate on the device."""

from __future__ import annotations

from gpu.model import Model, parser


def main() -> None:
    arguments = parser()
    arguments.add_argument("bits", nargs="+")
    options = arguments.parse_args()
    model = Model(options.scratch, options.tiny)
    model.write()
    for bits in options.bits:
        model.artifact(bits)


if __name__ == "__main__":
    main()
