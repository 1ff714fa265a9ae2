; registers: keeps known values in every register, and complains when one of them changes
;@ entry long64
;@ param rounds = 20000     rounds of checks between two letters on the serial port
;
; A round: load known values into all general registers but rsp, into xmm0-15 (ymm0-15 where there is AVX), the
; flags and the x87 and SSE control words; stay in a window where all of them are live and nothing is touched;
; save them all to the stack; compare. The window is a run of `pause`, and in every 64th round port
; writes, so that a vCPU is parked there nearly always. Every vCPU does this on its own stack.
;
; A changed register is printed in a line that starts with FAIL, and ends the guest with status 1.

    bits 64
    org 0x100000

SERIAL    equ 0x3f8
EXIT      equ 0xf4
ROUNDS    equ 0x9f000           ; where the first parameter is
DELAY     equ 0x80              ; a port that nobody listens at
FLAG_BITS equ 0xcd5             ; carry, parity, adjust, zero, sign, direction, overflow
FCW       equ 0xb7f             ; x87: round up
MXCSR     equ 0x3f80            ; SSE: round down
STEP      equ 0x9e3779b97f4a7c15

GENERAL   equ 15                ; `known` is 64-bit words: first the general registers,
VECTORS   equ GENERAL * 8       ; then, from this byte on, four words for each vector register
WORDS     equ GENERAL + 16 * 4
BLOCK     equ WORDS * 8
KEPT      equ BLOCK + 8

; What a vCPU keeps at [rsp] while the window is open, when it has no register for it
WINDOW    equ 0                 ; the address of this round's window
ROUND     equ 8
FLAG      equ 16                ; this round's flags
AVX       equ 24                ; 1 if there are ymm registers
VCPU      equ 32

start:
    and rsp, -64
    sub rsp, 64
    mov qword [rsp + ROUND], 0
    mov qword [rsp + AVX], 0
    mov qword [rsp + VCPU], rdi

    mov eax, 1
    cpuid
    and ecx, 0x18000000                 ; OSXSAVE and AVX
    cmp ecx, 0x18000000
    jne round
    xor ecx, ecx
    xgetbv
    and eax, 6                          ; the SSE and AVX state are on
    cmp eax, 6
    jne round
    mov qword [rsp + AVX], 1

round:
    mov rax, qword [rsp + ROUND]
    lea rcx, [rel flag_patterns]
    mov edx, eax
    and edx, 3
    mov rdx, qword [rcx + rdx * 8]
    mov qword [rsp + FLAG], rdx
    lea rcx, [rel window_of_pauses]
    test eax, 63
    jnz window_known
    lea rcx, [rel window_of_port_writes]
window_known:
    mov qword [rsp + WINDOW], rcx

%macro LOAD_XMM 1
    movdqu xmm%1, oword [rel known_vectors + %1 * 32]
%endmacro
%macro LOAD_YMM 1
    vmovdqu ymm%1, yword [rel known_vectors + %1 * 32]
%endmacro
%macro SAVE_XMM 1
    movdqu oword [rsp + VECTORS + %1 * 32], xmm%1
%endmacro
%macro SAVE_YMM 1
    vmovdqu yword [rsp + VECTORS + %1 * 32], ymm%1
%endmacro
%macro ALL_VECTORS 1
    %1 0
    %1 1
    %1 2
    %1 3
    %1 4
    %1 5
    %1 6
    %1 7
    %1 8
    %1 9
    %1 10
    %1 11
    %1 12
    %1 13
    %1 14
    %1 15
%endmacro

    cmp qword [rsp + AVX], 0
    jne load_ymm
    ALL_VECTORS LOAD_XMM
    jmp vectors_loaded
load_ymm:
    ALL_VECTORS LOAD_YMM
vectors_loaded:
    fldcw word [rel known_fcw]
    ldmxcsr dword [rel known_mxcsr]
    push qword [rsp + FLAG]
    popfq
    mov rax, qword [rel known + 0]          ; from here to pushfq nothing touches the flags
    mov rcx, qword [rel known + 8]
    mov rdx, qword [rel known + 16]
    mov rbx, qword [rel known + 24]
    mov rbp, qword [rel known + 32]
    mov rsi, qword [rel known + 40]
    mov rdi, qword [rel known + 48]
    mov r8, qword [rel known + 56]
    mov r9, qword [rel known + 64]
    mov r10, qword [rel known + 72]
    mov r11, qword [rel known + 80]
    mov r12, qword [rel known + 88]
    mov r13, qword [rel known + 96]
    mov r14, qword [rel known + 104]
    mov r15, qword [rel known + 112]
    jmp qword [rsp + WINDOW]

window_of_pauses:
%rep 256
    pause
%endrep
    jmp window_closed

window_of_port_writes:
%rep 2
    out DELAY, al
    pause
%endrep

window_closed:
    pushfq
    sub rsp, BLOCK                      ; saved as `known` is laid out
    mov qword [rsp + 0], rax
    mov qword [rsp + 8], rcx
    mov qword [rsp + 16], rdx
    mov qword [rsp + 24], rbx
    mov qword [rsp + 32], rbp
    mov qword [rsp + 40], rsi
    mov qword [rsp + 48], rdi
    mov qword [rsp + 56], r8
    mov qword [rsp + 64], r9
    mov qword [rsp + 72], r10
    mov qword [rsp + 80], r11
    mov qword [rsp + 88], r12
    mov qword [rsp + 96], r13
    mov qword [rsp + 104], r14
    mov qword [rsp + 112], r15
    cld
    lea rbp, [rsp + KEPT]               ; what the vCPU keeps, above block and flags
    cmp qword [rbp + AVX], 0
    jne save_ymm
    ALL_VECTORS SAVE_XMM
    jmp vectors_saved
save_ymm:
    ALL_VECTORS SAVE_YMM
vectors_saved:

    lea rsi, [rel known]
    xor ebx, ebx
compare:
    mov r12, qword [rsi + rbx * 8]
    mov r13, qword [rsp + rbx * 8]
    cmp r12, r13
    jne maybe_wrong
is_right:
    inc ebx
    cmp ebx, WORDS
    jb compare
    jmp compare_flags
maybe_wrong:                            ; without AVX the upper halves were not saved
    cmp qword [rbp + AVX], 0
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
    mov r12, qword [rbp + FLAG]
    mov r13, qword [rsp + BLOCK]
    and r13, FLAG_BITS
    lea rdi, [rel text_flags]
    cmp r12, r13
    jne fail
    fnstcw word [rsp]
    movzx r13d, word [rsp]
    mov r12d, FCW
    lea rdi, [rel text_fcw]
    cmp r12, r13
    jne fail
    stmxcsr dword [rsp]
    mov r13d, dword [rsp]
    mov r12d, MXCSR
    lea rdi, [rel text_mxcsr]
    cmp r12, r13
    jne fail

    mov rsp, rbp
    mov rax, qword [rsp + ROUND]
    inc rax
    mov qword [rsp + ROUND], rax
    xor edx, edx
    div qword [ROUNDS]
    test rdx, rdx
    jnz round
    mov cl, 'r'
    call lock_serial
    call print_char
    mov dword [rel serial_lock], 0
    jmp round


; Word ebx of `known` is wrong: what is its register called?
fail_word:
    lea rdi, [rel general_names]
    lea rdi, [rdi + rbx * 4]
    cmp ebx, GENERAL
    jb fail
    lea rdi, [rel vector_names]
    mov eax, ebx
    sub eax, GENERAL
    mov ecx, eax
    shr eax, 2
    shl eax, 3
    add rdi, rax
    test ecx, 2
    jz fail
    add rdi, 16 * 8                     ; the upper half

; The register whose name is at rdi should hold r12, and holds r13.
fail:
    call lock_serial                    ; for good: nobody prints after this line
    lea rsi, [rel text_fail]
    call print_text
    mov rsi, rdi
    call print_text
    lea rsi, [rel text_changed]
    call print_text
    mov r8, qword [rbp + VCPU]
    call print_hex
    lea rsi, [rel text_expected]
    call print_text
    mov r8, r12
    call print_hex
    lea rsi, [rel text_found]
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
    xchg dword [rel serial_lock], eax
    test eax, eax
    jnz lock_serial
    ret

; Print the character in cl.
print_char:
    mov dx, SERIAL + 5
    in al, dx
    test al, 0x20                       ; THRE: the transmit register takes another byte
    jz print_char
    mov dx, SERIAL
    mov al, cl
    out dx, al
    ret

; Print the text at rsi.
print_text:
    mov cl, byte [rsi]
    test cl, cl
    jz text_done
    call print_char
    inc rsi
    jmp print_text
text_done:
    ret

; Print r8 as 0x and its hexadecimal digits.
print_hex:
    mov cl, '0'
    call print_char
    mov cl, 'x'
    call print_char
    mov r9d, 16
skip_zeros:                             ; at most fifteen of them
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

text_fail:     db 10, "FAIL registers: ", 0
text_changed:  db " changed on vcpu ", 0
text_expected: db ": expected ", 0
text_found:    db ", found ", 0
text_flags:    db "flags", 0
text_fcw:      db "x87 control word", 0
text_mxcsr:    db "mxcsr", 0
; NAMES n, text, ...: each text in n bytes, zeros behind it
%macro NAMES 2-*
%assign BYTES %1
%rep %0 - 1
%rotate 1
%strlen LENGTH %1
    db %1
    times BYTES - LENGTH db 0
%endrep
%endmacro

general_names:
    NAMES 4, "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"
vector_names:
    NAMES 8, "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7"
    NAMES 8, "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
    NAMES 8, "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7"
    NAMES 8, "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", "ymm14", "ymm15"

align 64
flag_patterns:                          ; all clear, all set, and every second one
    dq 0, FLAG_BITS, FLAG_BITS & 0x895, FLAG_BITS & 0x440
known_fcw:   dw FCW
known_mxcsr: dd MXCSR

%assign VALUE STEP
known:
%rep GENERAL
    dq VALUE
%assign VALUE VALUE + STEP
%endrep
known_vectors:
%rep 64
    dq VALUE
%assign VALUE VALUE + STEP
%endrep

align 4096                              ; code is never on a page that is written
serial_lock:
    dd 0
