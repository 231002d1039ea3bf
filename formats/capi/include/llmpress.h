/* Reads checkpoints of language models. Made from formats/capi/src: do not edit.
 *
 * Ownership: what llmpress_open gives is closed by llmpress_close, once. Pointers within it (names, shapes, config) are its own and valid until
 * then. Buffers are the caller's.
 * Threads: any number of them may use a checkpoint at the same time; nobody may while it is closed. The message of an error is the thread's own.
 * Faults: every function that can fail returns a status; nothing aborts, whatever is in the files. */

#ifndef LLMPRESS_H
#define LLMPRESS_H

#include <stddef.h>
#include <stdint.h>

/*
 Counts changes of this interface that programs compiled before do not bear.
 */
#define LLMPRESS_ABI_VERSION 1

/*
 What a call came to.
 */
typedef enum {
  /*
   It did what it is for.
   */
  LLMPRESS_STATUS_OK = 0,
  /*
   A file could not be opened or read.
   */
  LLMPRESS_STATUS_IO = 1,
  /*
   A file breaks its format.
   */
  LLMPRESS_STATUS_CORRUPT = 2,
  /*
   A file is right, and not handled.
   */
  LLMPRESS_STATUS_UNSUPPORTED = 3,
  /*
   The caller's argument.
   */
  LLMPRESS_STATUS_INVALID = 4,
  /*
   More memory would be needed than there may be.
   */
  LLMPRESS_STATUS_LIMIT = 5,
  /*
   A fault of the library: please report it. What was called with may be used further.
   */
  LLMPRESS_STATUS_PANIC = 6,
} LlmpressStatus;

/*
 An open checkpoint.
 */
typedef struct LlmpressCheckpoint LlmpressCheckpoint;

/*
 A tensor. What it points to is its checkpoint's.
 */
typedef struct {
  /*
   Its name.
   */
  const char *name;
  /*
   The dtype that it decodes to, as safetensors calls it: "BF16", "F32".
   */
  const char *dtype;
  /*
   How it is stored: "raw", "dfloat11", "fixed12", "planes", "abq", "sparse24", "lowrank" or another tool's.
   */
  const char *encoding;
  /*
   `rank` sizes, the outermost first.
   */
  const uint64_t *shape;
  /*
   How many dimensions it has; 0 of a single number.
   */
  size_t rank;
  /*
   Its size when it is decoded.
   */
  uint64_t bytes;
} LlmpressTensor;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/*
 The version of the library, such as "0.1.0". Static.
 */
const char *llmpress_version(void);

/*
 LLMPRESS_ABI_VERSION of the library that runs, to be compared with the one of the header.
 */
uint32_t llmpress_abi_version(void);

/*
 What went wrong in this thread's last call that failed: one line that names file and tensor, and says what to do. Empty if none failed.
 Valid until the next call of this thread.
 */
const char *llmpress_error_message(void);

/*
 Opens a directory of Hugging Face, llmpress or official DFloat11, or a GGUF file, and reads its headers. `path` is UTF-8. On success `*out`
 is a checkpoint to be closed by llmpress_close, else NULL.

 With `numbers` other than 0 matrices that another tool quantised are tensors of the numbers that they stand for; with 0 they are listed
 as they are stored.

 # Safety
 `path` is a string that ends with NUL, `out` is valid for a pointer.
 */
LlmpressStatus llmpress_open(const char *path, int32_t numbers, LlmpressCheckpoint **out);

/*
 Opens a checkpoint that is stored as its difference from another one, `base`, as llmpress_open does; with NULL one that has no base.

 Tensors that are read compare what they use of the base with its digest.

 # Safety
 `path` is a string that ends with NUL, `base` too or NULL, `out` is valid for a pointer.
 */
LlmpressStatus llmpress_open_with_base(const char *path, int32_t numbers, const char *base, LlmpressCheckpoint **out);

/*
 Closes a checkpoint; NULL is nothing to do. Its tensors are not to be used any more.

 # Safety
 It comes from llmpress_open, was not closed, and no other thread uses it.
 */
void llmpress_close(LlmpressCheckpoint *checkpoint);

/*
 How many tensors there are; 0 for NULL.

 # Safety
 NULL, or a checkpoint that is open.
 */
size_t llmpress_tensor_count(const LlmpressCheckpoint *checkpoint);

/*
 A tensor by its number, in the order of names. What `*out` points to is the checkpoint's.

 # Safety
 A checkpoint that is open; `out` is valid for a tensor.
 */
LlmpressStatus llmpress_tensor_at(const LlmpressCheckpoint *checkpoint, size_t index, LlmpressTensor *out);

/*
 A tensor by its name.

 # Safety
 As of llmpress_tensor_at; `name` is a string that ends with NUL.
 */
LlmpressStatus llmpress_tensor_find(const LlmpressCheckpoint *checkpoint, const char *name, LlmpressTensor *out);

/*
 Decodes a whole tensor into `out`, whose size must be the tensor's `bytes`. Any alignment will do.

 # Safety
 A checkpoint that is open; `name` is a string that ends with NUL; `out` is valid for `out_bytes`.
 */
LlmpressStatus llmpress_read(const LlmpressCheckpoint *checkpoint, const char *name, void *out, size_t out_bytes);

/*
 Decodes rows `first` to `end`, without the last, of a tensor's first dimension. `out_bytes` must be their size: the tensor's `bytes`
 over its number of rows, times `end - first`. No more is read than that takes.

 # Safety
 As of llmpress_read.
 */
LlmpressStatus llmpress_read_rows(const LlmpressCheckpoint *checkpoint,
                                  const char *name,
                                  uint64_t first,
                                  uint64_t end,
                                  void *out,
                                  size_t out_bytes);

/*
 The text of config.json, UTF-8, or NULL where there is none (also for NULL). The checkpoint's.

 # Safety
 NULL, or a checkpoint that is open.
 */
const char *llmpress_config(const LlmpressCheckpoint *checkpoint);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LLMPRESS_H */
