; xsave: known values in x87, SSE and, where there is AVX, AVX registers and control words
;@ entry long64
    bits 64
    org 0x100000
READY equ 0x200000
GO equ 0x200001
EXIT equ 0xf4
start:
    mov eax, 1
    cpuid
    and ecx, 0x18000000                 ; OSXSAVE and AVX
    xor ebx, ebx
    cmp ecx, 0x18000000
    sete bl
    fldpi
    fldcw word [rel control]
    ldmxcsr dword [rel mxcsr]
    movdqu xmm3, oword [rel pattern]
    test ebx, ebx
    jz loaded
    vmovdqu ymm15, yword [rel pattern]
loaded:
    mov byte [READY], 1
moving:
    cmp byte [GO], 0
    je moving
    movdqu oword [0x200100], xmm3
    lea rsi, [rel pattern]
    mov edi, 0x200100
    mov ecx, 16
    repe cmpsb
    jne failed
    test ebx, ebx
    jz compared
    vmovdqu yword [0x200100], ymm15
    lea rsi, [rel pattern]
    mov edi, 0x200100
    mov ecx, 32
    repe cmpsb
    jne failed
compared:
    fnstcw word [0x200200]
    cmp word [0x200200], 0xb7f
    jne failed
    stmxcsr dword [0x200200]
    mov eax, dword [0x200200]
    and eax, 0xffc0                     ; without the sticky flags
    cmp eax, 0x3f80
    jne failed
    fldpi
    fcomip st0, st1
    jp failed
    jne failed
    xor al, al
    out EXIT, al
failed:
    mov al, 1
    out EXIT, al
control:
    dw 0xb7f
mxcsr:
    dd 0x3f80
pattern:
    dq 0x0123456789abcdef, 0xfedcba9876543210, 0x0f1e2d3c4b5a6978, 0x8796a5b4c3d2e1f0
