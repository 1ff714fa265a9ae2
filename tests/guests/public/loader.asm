; A loader's first half: A20, the memory map, and a kernel by LBA.
    bits 16
    org 0x7c00
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, 0x7c00
    mov ax, 0x2401
    int 0x15
    jc bad
    xor ebx, ebx
    mov di, 0x9000
    xor bp, bp
map:
    mov eax, 0xe820
    mov ecx, 24
    mov edx, 0x534d4150
    int 0x15
    jc bad
    cmp eax, 0x534d4150
    jne bad
    inc bp
    add di, 24
    test ebx, ebx
    jnz map
    mov ax, bp
    add al, '0'
    mov ah, 0x0e
    int 0x10
    mov ah, 0x41
    mov bx, 0x55aa
    mov dl, 0x80
    int 0x13
    jc bad
    mov ah, 0x42
    mov dl, 0x80
    mov si, packet
    int 0x13
    jc bad
    mov ah, 0x86            ; ten milliseconds
    xor cx, cx
    mov dx, 10000
    int 0x15
    jmp 0x1000:0
bad:
    mov ax, 0x0e00 + '?'
    int 0x10
    cli
    hlt
packet:
    db 16, 0
    dw 2
    dw 0, 0x1000
    dq 1
    times 510-($-$$) db 0
    dw 0xaa55

    mov ax, cs
    mov ds, ax
    mov si, kernel - 0x7e00
print:
    lodsb
    test al, al
    jz end
    mov ah, 0x0e
    int 0x10
    jmp print
end:
    hlt
    jmp end
kernel: db " kernel at 1000:0000", 0
    times 3 * 512 - ($ - $$) db 0
