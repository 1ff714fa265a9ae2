; int 15h, the machine: how much memory there is, A20, waiting, switching off

int15:
    SERVICE
    cmp ax, 0xe820
    je .map
    cmp ax, 0xe801
    je .sizes
    cmp ah, 0x88
    je .size
    cmp ah, 0x86
    je .wait
    cmp ah, 0x24
    je .a20
    cmp ah, 0x53
    je .power
    cmp ah, 0xc0                            ; what a caller tries first, and does without
    je .no_such
    cmp ah, 0xc1
    je .no_such
    cmp ah, 0xec                            ; "I am going to use 64-bit mode"
    je good
    cmp ah, 0x41
    je .no_such
    cmp ah, 0x4f
    je .no_such
    UNSERVED 0x15
.no_such:
    mov byte [bp + C_AX + 1], 0x86
    jmp bad

; EBX is the entry's number, from 0 on.
.map:
    cmp edx, 0x534d4150                     ; "SMAP"
    jne .no_such
    cmp ebx, 3
    ja .no_such
    mov [bp + C_AX], edx
    mov dword [bp + C_CX], 20
    lea eax, [ebx + 1]
    cmp ebx, 2
    jne .next_known
    cmp dword [es:high_memory], 0           ; the last one tells of memory beyond 4 GiB, where there is some
    jne .next_known
    xor eax, eax
.next_known:
    cmp ebx, 3
    jne .not_last
    xor eax, eax
.not_last:
    mov [bp + C_BX], eax
    mov es, [bp + C_ES]
    mov dword [es:di + 4], 0
    mov dword [es:di + 12], 0
    mov dword [es:di + 16], 1               ; RAM
    test ebx, ebx
    jz .low
    dec ebx
    jz .reserved
    dec ebx
    jz .middle
    mov dword [es:di], 0
    mov dword [es:di + 4], 1
    mov eax, [cs:high_memory]
    mov ecx, 1024
    mul ecx
    mov [es:di + 8], eax
    mov [es:di + 12], edx
    jmp good
.low:
    mov dword [es:di], 0
    mov dword [es:di + 8], 636 * 1024
    jmp good
.reserved:
    mov dword [es:di], 636 * 1024
    mov dword [es:di + 8], 0x100000 - 636 * 1024
    mov dword [es:di + 16], 2
    jmp good
.middle:
    mov dword [es:di], 0x100000
    mov eax, [cs:free_memory]
    sub eax, 0x100000
    mov [es:di + 8], eax
    jmp good

.sizes:                                     ; AX, CX: KiB from 1 to 16 MiB; BX, DX: 64 KiB from 16 MiB up
    mov eax, [es:free_memory]
    sub eax, 0x100000
    shr eax, 10
    xor edx, edx
    cmp eax, 15 * 1024
    jbe .small
    mov edx, eax
    sub edx, 15 * 1024
    shr edx, 6
    mov eax, 15 * 1024
.small:
    mov [bp + C_AX], ax
    mov [bp + C_CX], ax
    mov [bp + C_BX], dx
    mov [bp + C_DX], dx
    jmp good

.size:
    mov eax, [es:free_memory]
    sub eax, 0x100000
    shr eax, 10
    cmp eax, 0xfc00
    jbe .fits
    mov ax, 0xfc00
.fits:
    mov [bp + C_AX], ax
    jmp good

.a20:                                       ; it is on, whatever is asked for
    cmp al, 0x03
    ja .no_such
    mov byte [bp + C_AX + 1], 0
    jb .not_support
    mov word [bp + C_BX], 3
.not_support:
    cmp al, 0x02
    jne good
    mov byte [bp + C_AX], 1
    jmp good

.wait:                                      ; CX:DX microseconds, by the time stamp counter
    movzx eax, cx
    shl eax, 16
    mov ax, dx
    mul dword [es:tsc_khz]
    mov ecx, 1000
    mov esi, eax                            ; edx:eax / 1000, in two steps
    mov eax, edx
    xor edx, edx
    div ecx
    mov edi, eax
    mov eax, esi
    div ecx
    mov esi, eax                            ; edi:esi cycles
    rdtsc
    add esi, eax
    adc edi, edx
    sti
.not_yet:
    rdtsc
    sub eax, esi
    sbb edx, edi
    jc .not_yet
    jmp good

.power:                                     ; APM: connecting works, and switching off ends the guest
    cmp al, 0x07
    je .state
    cmp al, 0x00
    jne good
    mov word [bp + C_AX], 0x0102
    mov word [bp + C_BX], 0x504d            ; "PM"
    mov word [bp + C_CX], 3
    jmp good
.state:
    cmp cx, 3
    jne good
    xor al, al
    out 0xf4, al
    jmp good
