"""An ARM processor in this process: kernels compiled for ARM, run by Unicorn on this process's own memory."""

import struct

import llvmlite.binding as llvm
import unicorn
from unicorn import arm64_const as registers

from rkf.runtime.kernels.build import build

CODE, STACK, STACK_BYTES, PAGE_BYTES = 0x1000_0000, 0x2000_0000, 1 << 20, 4096
TRIPLE = "aarch64-unknown-linux-gnu"
SYMBOL, TEXT, RELOCATIONS = "kernel", ".text", 4


def compiled(name):
    """A kernel's object file for ARM."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return build(name, "neon", SYMBOL, TRIPLE)


class Sections:
    """The sections of an ELF object: name -> offset in the file, bytes, and the data that relocations need."""

    def __init__(self, code):
        self.code = bytearray(code)
        start, count, names = struct.unpack_from("<Q", code, 40)[0], *struct.unpack_from("<HH", code, 60)
        self.headers = [struct.unpack_from("<IIQQQQIIQQ", code, start + 64 * i) for i in range(count)]
        at = self.headers[names][4]
        self.names = [code[at + h[0] : code.index(0, at + h[0])].decode() for h in self.headers]

    def text(self):
        """The instructions, u32 each."""
        _, _, _, _, offset, size, *_ = self.headers[self.names.index(TEXT)]
        return [word for (word,) in struct.iter_unpack("<I", self.code[offset : offset + size])]

    def entry(self):
        """The offset of the kernel in the file."""
        header = self.headers[self.names.index(".symtab")]
        strings = self.headers[header[6]][4]
        for name, _, _, section, value, _ in struct.iter_unpack(
            "<IBBHQQ", self.code[header[4] : header[4] + header[5]]
        ):
            if self.code[strings + name :].startswith(SYMBOL.encode() + b"\0"):
                return self.headers[section][4] + value
        raise LookupError(SYMBOL)

    def linked(self, base):
        """The whole file prepared for the address `base`, with its relocations (constants that the code loads) done."""
        for header in self.headers:
            if header[1] != RELOCATIONS or self.names[header[7]] != TEXT:
                continue
            symbols, text = self.headers[header[6]][4], self.headers[header[7]][4]
            for at, info, addend in struct.iter_unpack("<QQq", self.code[header[4] : header[4] + header[5]]):
                _, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", self.code, symbols + 24 * (info >> 32))
                target = base + self.headers[section][4] + value + addend
                self._relocate(text + at, base + text + at, info & 0xFFFFFFFF, target)
        return bytes(self.code)

    def _relocate(self, offset, place, kind, target):
        """ADRP of a page; the low bits for ADD and for loads of 4, 8, 16 bytes (Arm's ELF for AArch64)."""
        (word,) = struct.unpack_from("<I", self.code, offset)
        scale = {277: 0, 285: 2, 286: 3, 299: 4}
        if kind == 275:
            pages = (target >> 12) - (place >> 12)
            word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
        else:
            word |= (target & 0xFFF) >> scale[kind] << 10
        struct.pack_into("<I", self.code, offset, word)


class Processor:
    """Runs one object's kernel. It sees this process's memory, mapped one page at a time."""

    def __init__(self, code):
        sections = Sections(code)
        self._engine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._engine.ctl_set_cpu_model(registers.UC_CPU_ARM64_MAX)
        image = sections.linked(CODE)
        self._engine.mem_map(CODE, -(-len(image) // PAGE_BYTES) * PAGE_BYTES)
        self._engine.mem_write(CODE, image)
        self._engine.mem_map(STACK, STACK_BYTES)
        self._engine.reg_write(registers.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # enables vector registers
        self._engine.hook_add(unicorn.UC_HOOK_MEM_UNMAPPED, self._map)
        self._entry = CODE + sections.entry()

    def __call__(self, *arguments):
        if len(arguments) > 8:
            raise ValueError("more arguments than registers")
        for number, value in enumerate(arguments):
            self._engine.reg_write(registers.UC_ARM64_REG_X0 + number, value)
        self._engine.reg_write(registers.UC_ARM64_REG_SP, STACK + STACK_BYTES)
        self._engine.reg_write(registers.UC_ARM64_REG_LR, STACK)
        self._engine.emu_start(self._entry, STACK)

    def _map(self, engine, access, address, size, value, data):
        for page in range(address // PAGE_BYTES, (address + size - 1) // PAGE_BYTES + 1):
            here = page * PAGE_BYTES
            engine.mem_map_ptr(here, PAGE_BYTES, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, here)
        return True
