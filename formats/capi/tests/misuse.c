/* What C can do wrong, and what must come of it: a status and a message, never the end of the program. Threads read beside each other. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "llmpress.h"

#define MUST(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #what, llmpress_error_message()); \
            exit(1); \
        } \
    } while (0)

static const LlmpressCheckpoint *shared;
static const char *name;
static unsigned char *whole;
static uint64_t row_bytes, rows;

static void *read_rows(void *argument) {
    size_t seed = (size_t)argument;
    /* Not aligned for any dtype. */
    unsigned char *buffer = malloc(row_bytes * 3 + 1);
    for (uint64_t i = 0; i < 50; i++) {
        uint64_t first = (seed * 7 + i * 13) % (rows - 3);
        MUST(llmpress_read_rows(shared, name, first, first + 3, buffer + 1, row_bytes * 3) == LLMPRESS_STATUS_OK);
        MUST(!memcmp(buffer + 1, whole + first * row_bytes, row_bytes * 3));
    }
    /* The message is this thread's own. */
    MUST(llmpress_read(shared, seed % 2 ? "one" : "other", buffer, 1) == LLMPRESS_STATUS_INVALID);
    MUST(strstr(llmpress_error_message(), seed % 2 ? "one" : "other"));
    free(buffer);
    return NULL;
}

int main(int argc, char **argv) {
    LlmpressCheckpoint *checkpoint = (LlmpressCheckpoint *)&argc;
    LlmpressTensor tensor;
    char byte = 0;
    MUST(argc == 7);
    MUST(*llmpress_error_message() == 0);
    MUST(llmpress_open(NULL, 0, &checkpoint) == LLMPRESS_STATUS_INVALID && !checkpoint);
    MUST(llmpress_open(argv[1], 0, NULL) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_open("\xff\xfe", 0, &checkpoint) == LLMPRESS_STATUS_INVALID && !checkpoint);
    MUST(llmpress_open("/nowhere/at/all", 0, &checkpoint) == LLMPRESS_STATUS_IO && !checkpoint);
    MUST(strstr(llmpress_error_message(), "/nowhere/at/all"));
    /* A checkpoint whose header is cut off. */
    MUST(llmpress_open(argv[3], 0, &checkpoint) == LLMPRESS_STATUS_CORRUPT && !checkpoint);
    MUST(llmpress_tensor_count(NULL) == 0 && !llmpress_config(NULL));
    MUST(llmpress_tensor_at(NULL, 0, &tensor) == LLMPRESS_STATUS_INVALID);
    llmpress_close(NULL);
    name = argv[2];
    MUST(llmpress_open(argv[1], 0, &checkpoint) == LLMPRESS_STATUS_OK && checkpoint);
    MUST(strstr(llmpress_config(checkpoint), "model_type"));
    MUST(llmpress_tensor_at(checkpoint, llmpress_tensor_count(checkpoint), &tensor) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_tensor_at(checkpoint, 0, NULL) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_tensor_find(checkpoint, "model.layers.0.self_attn.q_pro.weight", &tensor) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_tensor_find(checkpoint, NULL, &tensor) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_tensor_find(checkpoint, name, &tensor) == LLMPRESS_STATUS_OK && !strcmp(tensor.name, name));
    MUST(llmpress_read(checkpoint, name, NULL, tensor.bytes) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_read(checkpoint, name, &byte, 1) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_read(checkpoint, name, &byte, (size_t)-1) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_read_rows(checkpoint, name, 2, 1, &byte, 1) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_read_rows(checkpoint, name, 0, UINT64_MAX, &byte, 1) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_read_rows(checkpoint, name, 0, 0, NULL, 0) == LLMPRESS_STATUS_OK);
    rows = tensor.shape[0];
    row_bytes = tensor.bytes / rows;
    whole = malloc(tensor.bytes);
    MUST(llmpress_read(checkpoint, name, whole, tensor.bytes) == LLMPRESS_STATUS_OK);
    shared = checkpoint;
    pthread_t threads[4];
    for (size_t i = 0; i < 4; i++) MUST(!pthread_create(&threads[i], NULL, read_rows, (void *)i));
    for (size_t i = 0; i < 4; i++) MUST(!pthread_join(threads[i], NULL));
    free(whole);
    llmpress_close(checkpoint);
    /* A fine-tune that is stored as its difference from a base reads like the fine-tune itself, and not without the base. */
    LlmpressCheckpoint *tuned;
    MUST(llmpress_open_with_base(argv[1], 0, argv[5], &checkpoint) == LLMPRESS_STATUS_INVALID && !checkpoint);
    MUST(llmpress_open_with_base(argv[4], 0, "/nowhere/at/all", &checkpoint) == LLMPRESS_STATUS_IO && !checkpoint);
    MUST(llmpress_open_with_base(argv[4], 0, argv[5], NULL) == LLMPRESS_STATUS_INVALID);
    MUST(llmpress_open_with_base(argv[4], 0, NULL, &checkpoint) == LLMPRESS_STATUS_OK);
    size_t refused = 0;
    for (size_t i = 0; i < llmpress_tensor_count(checkpoint); i++) {
        MUST(llmpress_tensor_at(checkpoint, i, &tensor) == LLMPRESS_STATUS_OK);
        unsigned char *bytes = malloc(tensor.bytes + 1);
        if (llmpress_read(checkpoint, tensor.name, bytes, tensor.bytes) != LLMPRESS_STATUS_OK) {
            MUST(strstr(llmpress_error_message(), "base"));
            refused++;
        }
        free(bytes);
    }
    MUST(refused > 0);
    llmpress_close(checkpoint);
    MUST(llmpress_open_with_base(argv[4], 0, argv[5], &checkpoint) == LLMPRESS_STATUS_OK);
    MUST(llmpress_open(argv[6], 0, &tuned) == LLMPRESS_STATUS_OK);
    MUST(llmpress_tensor_count(checkpoint) == llmpress_tensor_count(tuned));
    for (size_t i = 0; i < llmpress_tensor_count(tuned); i++) {
        MUST(llmpress_tensor_at(tuned, i, &tensor) == LLMPRESS_STATUS_OK);
        unsigned char *a = malloc(tensor.bytes + 1), *b = malloc(tensor.bytes + 1);
        MUST(llmpress_read(tuned, tensor.name, a, tensor.bytes) == LLMPRESS_STATUS_OK);
        MUST(llmpress_read(checkpoint, tensor.name, b, tensor.bytes) == LLMPRESS_STATUS_OK);
        MUST(!memcmp(a, b, tensor.bytes));
        free(a);
        free(b);
    }
    llmpress_close(checkpoint);
    llmpress_close(tuned);
    puts("well");
    return 0;
}
