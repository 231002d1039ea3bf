/* Lists the tensors of a checkpoint, or decodes one: all of it, or rows of it, to standard output.
 *
 *   decode CHECKPOINT                      a line for each tensor: name, dtype, shape, encoding, bytes
 *   decode CHECKPOINT TENSOR               its bytes
 *   decode CHECKPOINT TENSOR FIRST END     those of rows FIRST to END, without the last
 *
 *   cargo build --release -p llmpress-capi
 *   cc -I formats/capi/include formats/capi/examples/decode.c target/release/libllmpress_c.a -lm -lpthread -ldl -o decode
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#include "llmpress.h"

static int failed(const char *what) {
    fprintf(stderr, "%s: %s\n", what, llmpress_error_message());
    return 1;
}

static int list(const LlmpressCheckpoint *checkpoint) {
    size_t count = llmpress_tensor_count(checkpoint);
    for (size_t i = 0; i < count; i++) {
        LlmpressTensor tensor;
        if (llmpress_tensor_at(checkpoint, i, &tensor) != LLMPRESS_STATUS_OK) return failed("list");
        printf("%s %s [", tensor.name, tensor.dtype);
        for (size_t d = 0; d < tensor.rank; d++) printf(d ? ", %" PRIu64 : "%" PRIu64, tensor.shape[d]);
        printf("] %s %" PRIu64 "\n", tensor.encoding, tensor.bytes);
    }
    return 0;
}

static int decode(const LlmpressCheckpoint *checkpoint, const char *name, const char *first, const char *end) {
    LlmpressTensor tensor;
    if (llmpress_tensor_find(checkpoint, name, &tensor) != LLMPRESS_STATUS_OK) return failed("find");
    uint64_t bytes = tensor.bytes, from = 0, to = 0;
    if (first) {
        from = strtoull(first, NULL, 10);
        to = strtoull(end, NULL, 10);
        uint64_t rows = tensor.rank ? tensor.shape[0] : 0;
        /* What does not fit is refused below. */
        bytes = rows && from <= to && to <= rows ? tensor.bytes / rows * (to - from) : 0;
    }
    void *out = malloc(bytes ? bytes : 1);
    if (!out) {
        fprintf(stderr, "decode: no memory for %" PRIu64 " bytes\n", bytes);
        return 1;
    }
    LlmpressStatus status = first ? llmpress_read_rows(checkpoint, name, from, to, out, bytes) : llmpress_read(checkpoint, name, out, bytes);
    int code = 0;
    if (status != LLMPRESS_STATUS_OK) {
        code = failed("decode");
    } else if (fwrite(out, 1, bytes, stdout) != bytes || fflush(stdout)) {
        perror("stdout");
        code = 1;
    }
    free(out);
    return code;
}

int main(int argc, char **argv) {
    if (argc != 2 && argc != 3 && argc != 5) {
        fprintf(stderr, "usage: decode CHECKPOINT [TENSOR [FIRST END]]\n");
        return 2;
    }
    if (llmpress_abi_version() != LLMPRESS_ABI_VERSION) {
        fprintf(stderr, "the library is version %s, of another interface\n", llmpress_version());
        return 2;
    }
    LlmpressCheckpoint *checkpoint = NULL;
    if (llmpress_open(argv[1], 1, &checkpoint) != LLMPRESS_STATUS_OK) return failed("open");
    int code = argc == 2 ? list(checkpoint) : decode(checkpoint, argv[2], argc == 5 ? argv[3] : NULL, argc == 5 ? argv[4] : NULL);
    llmpress_close(checkpoint);
    return code;
}
