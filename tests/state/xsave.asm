# xsave: known values in x87, SSE and, where there is AVX, AVX registers and control words
#@ entry long64
READY = 0x200000
GO    = 0x200001
EXIT  = 0xf4
start:
    mov eax, 1
    cpuid
    and ecx, 0x18000000                 # OSXSAVE and AVX
    xor ebx, ebx
    cmp ecx, 0x18000000
    sete bl
    fldpi
    fldcw word ptr [rip + control]
    ldmxcsr dword ptr [rip + mxcsr]
    movdqu xmm3, xmmword ptr [rip + pattern]
    test ebx, ebx
    jz loaded
    vmovdqu ymm15, ymmword ptr [rip + pattern]
loaded:
    mov byte ptr [READY], 1
moving:
    cmp byte ptr [GO], 0
    je moving
    movdqu xmmword ptr [0x200100], xmm3
    lea rsi, [rip + pattern]
    mov edi, 0x200100
    mov ecx, 16
    repe cmpsb
    jne failed
    test ebx, ebx
    jz compared
    vmovdqu ymmword ptr [0x200100], ymm15
    lea rsi, [rip + pattern]
    mov edi, 0x200100
    mov ecx, 32
    repe cmpsb
    jne failed
compared:
    fnstcw word ptr [0x200200]
    cmp word ptr [0x200200], 0xb7f
    jne failed
    stmxcsr dword ptr [0x200200]
    mov eax, dword ptr [0x200200]
    and eax, 0xffc0                     # without the sticky flags
    cmp eax, 0x3f80
    jne failed
    fldpi
    fcomip st(0), st(1)
    jp failed
    jne failed
    xor al, al
    out EXIT, al
failed:
    mov al, 1
    out EXIT, al
control:
    .short 0xb7f
mxcsr:
    .long 0x3f80
pattern:
    .quad 0x0123456789abcdef, 0xfedcba9876543210, 0x0f1e2d3c4b5a6978, 0x8796a5b4c3d2e1f0
