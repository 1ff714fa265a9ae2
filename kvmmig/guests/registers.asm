# registers: keeps known values in every register, and complains when one of them changes
#@ entry long64
#@ param rounds = 20000     rounds of checks between two letters on the serial port
#
# A round: load known values into all general registers but rsp, into xmm0-15 (ymm0-15 where there is AVX), the
# flags and the x87 and SSE control words; stay in a window where all of them are live and nothing is touched;
# save them all to the stack; compare. The window is a run of `pause`, and in every 64th round port
# writes, so that a vCPU is parked there nearly always. Every vCPU does this on its own stack.
#
# A changed register is printed in a line that starts with FAIL, and ends the guest with status 1.

SERIAL = 0x3f8
EXIT   = 0xf4
DELAY  = 0x80           # a port that nobody listens at
FLAG_BITS = 0xcd5          # carry, parity, adjust, zero, sign, direction, overflow
FCW    = 0xb7f          # x87: round up
MXCSR  = 0x3f80         # SSE: round down
STEP   = 0x9e3779b97f4a7c15

GENERAL = 15            # `known` is 64-bit words: first the general registers,
VECTORS = GENERAL * 8   # then, from this byte on, four words for each vector register
WORDS   = GENERAL + 16 * 4
BLOCK   = WORDS * 8
KEPT    = BLOCK + 8

# What a vCPU keeps at [rsp] while the window is open, when it has no register for it
WINDOW = 0              # the address of this round's window
ROUND  = 8
FLAG   = 16             # this round's flags
AVX    = 24             # 1 if there are ymm registers
VCPU   = 32

start:
    and rsp, -64
    sub rsp, 64
    mov qword ptr [rsp + ROUND], 0
    mov qword ptr [rsp + AVX], 0
    mov qword ptr [rsp + VCPU], rdi

    mov eax, 1
    cpuid
    and ecx, 0x18000000                 # OSXSAVE and AVX
    cmp ecx, 0x18000000
    jne round
    xor ecx, ecx
    xgetbv
    and eax, 6                          # the SSE and AVX state are on
    cmp eax, 6
    jne round
    mov qword ptr [rsp + AVX], 1

round:
    mov rax, qword ptr [rsp + ROUND]
    lea rcx, [rip + flag_patterns]
    mov edx, eax
    and edx, 3
    mov rdx, qword ptr [rcx + rdx * 8]
    mov qword ptr [rsp + FLAG], rdx
    lea rcx, [rip + window_of_pauses]
    test eax, 63
    jnz window_known
    lea rcx, [rip + window_of_port_writes]
window_known:
    mov qword ptr [rsp + WINDOW], rcx

.macro LOAD_XMM number
    movdqu xmm\number, xmmword ptr [rip + known_vectors + \number * 32]
.endm
.macro LOAD_YMM number
    vmovdqu ymm\number, ymmword ptr [rip + known_vectors + \number * 32]
.endm
.macro SAVE_XMM number
    movdqu xmmword ptr [rsp + VECTORS + \number * 32], xmm\number
.endm
.macro SAVE_YMM number
    vmovdqu ymmword ptr [rsp + VECTORS + \number * 32], ymm\number
.endm
.macro ALL_VECTORS do
    \do 0
    \do 1
    \do 2
    \do 3
    \do 4
    \do 5
    \do 6
    \do 7
    \do 8
    \do 9
    \do 10
    \do 11
    \do 12
    \do 13
    \do 14
    \do 15
.endm

    cmp qword ptr [rsp + AVX], 0
    jne load_ymm
    ALL_VECTORS LOAD_XMM
    jmp vectors_loaded
load_ymm:
    ALL_VECTORS LOAD_YMM
vectors_loaded:
    fldcw word ptr [rip + known_fcw]
    ldmxcsr dword ptr [rip + known_mxcsr]
    push qword ptr [rsp + FLAG]
    popfq
    mov rax, qword ptr [rip + known + 0]    # from here to pushfq nothing touches the flags
    mov rcx, qword ptr [rip + known + 8]
    mov rdx, qword ptr [rip + known + 16]
    mov rbx, qword ptr [rip + known + 24]
    mov rbp, qword ptr [rip + known + 32]
    mov rsi, qword ptr [rip + known + 40]
    mov rdi, qword ptr [rip + known + 48]
    mov r8, qword ptr [rip + known + 56]
    mov r9, qword ptr [rip + known + 64]
    mov r10, qword ptr [rip + known + 72]
    mov r11, qword ptr [rip + known + 80]
    mov r12, qword ptr [rip + known + 88]
    mov r13, qword ptr [rip + known + 96]
    mov r14, qword ptr [rip + known + 104]
    mov r15, qword ptr [rip + known + 112]
    jmp qword ptr [rsp + WINDOW]

window_of_pauses:
.rept 256
    pause
.endr
    jmp window_closed

window_of_port_writes:
.rept 2
    out DELAY, al
    pause
.endr

window_closed:
    pushfq
    sub rsp, BLOCK                      # saved as `known` is laid out
    mov qword ptr [rsp + 0], rax
    mov qword ptr [rsp + 8], rcx
    mov qword ptr [rsp + 16], rdx
    mov qword ptr [rsp + 24], rbx
    mov qword ptr [rsp + 32], rbp
    mov qword ptr [rsp + 40], rsi
    mov qword ptr [rsp + 48], rdi
    mov qword ptr [rsp + 56], r8
    mov qword ptr [rsp + 64], r9
    mov qword ptr [rsp + 72], r10
    mov qword ptr [rsp + 80], r11
    mov qword ptr [rsp + 88], r12
    mov qword ptr [rsp + 96], r13
    mov qword ptr [rsp + 104], r14
    mov qword ptr [rsp + 112], r15
    cld
    lea rbp, [rsp + KEPT]               # what the vCPU keeps, above block and flags
    cmp qword ptr [rbp + AVX], 0
    jne save_ymm
    ALL_VECTORS SAVE_XMM
    jmp vectors_saved
save_ymm:
    ALL_VECTORS SAVE_YMM
vectors_saved:

    lea rsi, [rip + known]
    xor ebx, ebx
compare:
    mov r12, qword ptr [rsi + rbx * 8]
    mov r13, qword ptr [rsp + rbx * 8]
    cmp r12, r13
    jne maybe_wrong
is_right:
    inc ebx
    cmp ebx, WORDS
    jb compare
    jmp compare_flags
maybe_wrong:                            # without AVX the upper halves were not saved
    cmp qword ptr [rbp + AVX], 0
    jne wrong_word
    cmp ebx, GENERAL
    jb wrong_word
    mov eax, ebx
    sub eax, GENERAL
    test eax, 2
    jnz is_right
wrong_word:
    jmp fail_word

compare_flags:
    mov r12, qword ptr [rbp + FLAG]
    mov r13, qword ptr [rsp + BLOCK]
    and r13, FLAG_BITS
    lea rdi, [rip + text_flags]
    cmp r12, r13
    jne fail
    fnstcw word ptr [rsp]
    movzx r13d, word ptr [rsp]
    mov r12d, FCW
    lea rdi, [rip + text_fcw]
    cmp r12, r13
    jne fail
    stmxcsr dword ptr [rsp]
    mov r13d, dword ptr [rsp]
    mov r12d, MXCSR
    lea rdi, [rip + text_mxcsr]
    cmp r12, r13
    jne fail

    mov rsp, rbp
    mov rax, qword ptr [rsp + ROUND]
    inc rax
    mov qword ptr [rsp + ROUND], rax
    xor edx, edx
    movabs rcx, ROUNDS
    div rcx
    test rdx, rdx
    jnz round
    mov cl, 'r'
    call lock_serial
    call print_char
    mov dword ptr [rip + serial_lock], 0
    jmp round


# Word ebx of `known` is wrong: what is its register called?
fail_word:
    lea rdi, [rip + general_names]
    lea rdi, [rdi + rbx * 4]
    cmp ebx, GENERAL
    jb fail
    lea rdi, [rip + vector_names]
    mov eax, ebx
    sub eax, GENERAL
    mov ecx, eax
    shr eax, 2
    shl eax, 3
    add rdi, rax
    test ecx, 2
    jz fail
    add rdi, 16 * 8                     # the upper half

# The register whose name is at rdi should hold r12, and holds r13.
fail:
    call lock_serial                    # for good: nobody prints after this line
    lea rsi, [rip + text_fail]
    call print_text
    mov rsi, rdi
    call print_text
    lea rsi, [rip + text_changed]
    call print_text
    mov r8, qword ptr [rbp + VCPU]
    call print_hex
    lea rsi, [rip + text_expected]
    call print_text
    mov r8, r12
    call print_hex
    lea rsi, [rip + text_found]
    call print_text
    mov r8, r13
    call print_hex
    mov cl, 10
    call print_char
    mov al, 1
    out EXIT, al
ended:
    jmp ended

lock_serial:
    mov eax, 1
    xchg dword ptr [rip + serial_lock], eax
    test eax, eax
    jnz lock_serial
    ret

# Print the character in cl.
print_char:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       # THRE: the transmit register takes another byte
    jz print_char
    mov dx, SERIAL
    mov al, cl
    out dx, al
    ret

# Print the text at rsi.
print_text:
    mov cl, byte ptr [rsi]
    test cl, cl
    jz text_done
    call print_char
    inc rsi
    jmp print_text
text_done:
    ret

# Print r8 as 0x and its hexadecimal digits.
print_hex:
    mov cl, '0'
    call print_char
    mov cl, 'x'
    call print_char
    mov r9d, 16
skip_zeros:                             # at most fifteen of them
    mov rax, r8
    shr rax, 60
    jnz next_nibble
    shl r8, 4
    dec r9d
    cmp r9d, 1
    ja skip_zeros
next_nibble:
    mov rcx, r8
    shr rcx, 60
    shl r8, 4
    add ecx, '0'
    cmp ecx, '9'
    jbe nibble_known
    add ecx, 'a' - '0' - 10
nibble_known:
    call print_char
    dec r9d
    jnz next_nibble
    ret

text_fail:     .asciz "\nFAIL registers: "
text_changed:  .asciz " changed on vcpu "
text_expected: .asciz ": expected "
text_found:    .asciz ", found "
text_flags:    .asciz "flags"
text_fcw:      .asciz "x87 control word"
text_mxcsr:    .asciz "mxcsr"
general_names:                          # four bytes each
    .ascii "rax\0rcx\0rdx\0rbx\0rbp\0rsi\0rdi\0r8\0\0r9\0\0r10\0r11\0r12\0r13\0r14\0r15\0"
vector_names:                           # eight bytes each
    .ascii "xmm0\0\0\0\0xmm1\0\0\0\0xmm2\0\0\0\0xmm3\0\0\0\0xmm4\0\0\0\0xmm5\0\0\0\0xmm6\0\0\0\0xmm7\0\0\0\0"
    .ascii "xmm8\0\0\0\0xmm9\0\0\0\0xmm10\0\0\0xmm11\0\0\0xmm12\0\0\0xmm13\0\0\0xmm14\0\0\0xmm15\0\0\0"
    .ascii "ymm0\0\0\0\0ymm1\0\0\0\0ymm2\0\0\0\0ymm3\0\0\0\0ymm4\0\0\0\0ymm5\0\0\0\0ymm6\0\0\0\0ymm7\0\0\0\0"
    .ascii "ymm8\0\0\0\0ymm9\0\0\0\0ymm10\0\0\0ymm11\0\0\0ymm12\0\0\0ymm13\0\0\0ymm14\0\0\0ymm15\0\0\0"

.balign 64
flag_patterns:                          # all clear, all set, and every second one
    .quad 0, FLAG_BITS, FLAG_BITS & 0x895, FLAG_BITS & 0x440
known_fcw:   .word FCW
known_mxcsr: .long MXCSR

VALUE = STEP
known:
.rept GENERAL
    .quad VALUE
    VALUE = VALUE + STEP
.endr
known_vectors:
.rept 64
    .quad VALUE
    VALUE = VALUE + STEP
.endr

.balign 4096                            # code is never on a page that is written
serial_lock:
    .long 0
