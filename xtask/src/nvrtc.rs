//! NVIDIA's run-time compiler, from a pinned package.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::{fs, ptr};

use libloading::Library;

use crate::package::Release;

/// Makes the PTX that is shipped: it runs on every driver from 550 on.
pub(crate) const SHIPPED: Release = Release {
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.4.127",
    sha256: "a178759ebb095827bd30ef56598ec182b85547f1508941a3d560eb7ea1fbf338",
};

/// Knows newer architectures.
pub(crate) const NEWER: Release = Release {
    package: "nvidia-cuda-nvrtc-cu12",
    version: "12.8.93",
    sha256: "a7756528852ef889772a84c6cd89d41dfa74667e24cca16bb31f8f061e3e9994",
};

/// The compiler's library.
pub(crate) struct Nvrtc {
    library: Library,
    // The compiler looks for it when it first runs.
    _builtins: Library,
}

type Program = *mut c_void;

impl Nvrtc {
    /// Fetches the release with pip, unless `target/nvrtc` has it, and loads it.
    pub(crate) fn open(release: Release, target: &Path) -> Result<Self, String> {
        let dir = release.unpacked(&target.join("nvrtc"))?;
        let lib = dir.join("nvidia/cuda_nvrtc/lib");
        let (mut compiler, mut builtins) = (None, None);
        for entry in fs::read_dir(&lib).map_err(|e| format!("{}: {e}", lib.display()))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".alt.") {
                continue;
            }
            if name.starts_with("libnvrtc-builtins.so") {
                builtins = Some(entry.path());
            } else if name.starts_with("libnvrtc.so") {
                compiler = Some(entry.path());
            }
        }
        let load = |path: Option<PathBuf>| {
            let path = path.ok_or_else(|| format!("{} has no libnvrtc", lib.display()))?;
            // SAFETY: the package was checked by its digest; loading it runs its initialisers only.
            #[allow(unsafe_code)]
            unsafe { Library::new(&path) }.map_err(|e| format!("{}: {e}", path.display()))
        };
        Ok(Self { _builtins: load(builtins)?, library: load(compiler)? })
    }

    /// Compiles a source to PTX. `headers`: names and texts. `macro_name` is defined.
    ///
    /// The error is what the compiler says.
    #[allow(unsafe_code)]
    pub(crate) fn compile(
        &self,
        name: &str,
        source: &str,
        headers: &[(String, String)],
        architecture: &str,
        macro_name: Option<&str>,
    ) -> Result<String, String> {
        let text = |s: &str| CString::new(s).map_err(|_| format!("{name} holds a zero byte"));
        let (source, name_text) = (text(source)?, text(name)?);
        let names = headers.iter().map(|(name, _)| text(name)).collect::<Result<Vec<_>, _>>()?;
        let texts = headers.iter().map(|(_, content)| text(content)).collect::<Result<Vec<_>, _>>()?;
        let pointers = |list: &[CString]| list.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
        let options =
            [format!("--gpu-architecture={architecture}"), "--fmad=false".into(), "--std=c++17".into()]
                .into_iter()
                .chain(macro_name.map(|name| format!("--define-macro={name}")))
                .map(|option| text(&option))
                .collect::<Result<Vec<_>, _>>()?;
        let missing = |e: libloading::Error| format!("the compiler's library lacks a function: {e}");
        // SAFETY: the signatures are those of nvrtc.h of CUDA 12; every text ends in a zero byte and outlives the calls;
        // the buffers have the sizes that the compiler asked for.
        unsafe {
            type Create = unsafe extern "C" fn(
                *mut Program,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int;
            type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
            type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
            type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
            type Destroy = unsafe extern "C" fn(*mut Program) -> c_int;
            let create = self.library.get::<Create>(b"nvrtcCreateProgram\0").map_err(missing)?;
            let compile = self.library.get::<Compile>(b"nvrtcCompileProgram\0").map_err(missing)?;
            let destroy = self.library.get::<Destroy>(b"nvrtcDestroyProgram\0").map_err(missing)?;
            let output = |program: Program, size: &[u8], get: &[u8]| -> Result<String, String> {
                let mut bytes = 0;
                let size = self.library.get::<Size>(size).map_err(missing)?;
                let get = self.library.get::<Get>(get).map_err(missing)?;
                size(program, &mut bytes);
                let mut buffer = vec![0u8; bytes.max(1)];
                get(program, buffer.as_mut_ptr().cast());
                let text = CStr::from_bytes_until_nul(&buffer).map_err(|e| e.to_string())?;
                Ok(text.to_string_lossy().into_owned())
            };
            let mut program = ptr::null_mut();
            let made = create(
                &mut program,
                source.as_ptr(),
                name_text.as_ptr(),
                headers.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            );
            if made != 0 {
                return Err(format!("{name}: nvrtcCreateProgram returned {made}"));
            }
            let status = compile(program, options.len() as c_int, pointers(&options).as_ptr());
            let log = output(program, b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?;
            let result = if status != 0 {
                Err(format!("{name} for {architecture}:\n{log}"))
            } else if log.contains("warning") {
                Err(format!("{name} for {architecture} compiles with warnings:\n{log}"))
            } else {
                output(program, b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0")
            };
            destroy(&mut program);
            result
        }
    }
}
