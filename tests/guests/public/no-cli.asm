; Switches to 32-bit protected mode, and forgets to switch interrupts off before.
[org 0x7c00]
    mov bp, 0x9000
    mov sp, bp
    mov si, MSG_REAL_MODE
print:
    lodsb
    cmp al, 0
    je switch
    mov ah, 0x0e
    int 0x10
    jmp print
switch:
    sti
    lgdt [gdt_descriptor]
    mov eax, cr0
    or eax, 0x1
    mov cr0, eax
    jmp CODE_SEG:init_pm

[bits 32]
init_pm:
    mov ax, DATA_SEG
    mov ds, ax
    mov ss, ax
    mov es, ax
    mov ebp, 0x90000
    mov esp, ebp
    mov ebx, MSG_PROT_MODE
    mov edx, 0xb8000
.loop:
    mov al, [ebx]
    mov ah, 0x0f
    cmp al, 0
    je .done
    mov [edx], ax
    add ebx, 1
    add edx, 2
    jmp .loop
.done:
    jmp $

gdt_start:
    dd 0x0
    dd 0x0
gdt_code:
    dw 0xffff
    dw 0x0
    db 0x0
    db 10011010b
    db 11001111b
    db 0x0
gdt_data:
    dw 0xffff
    dw 0x0
    db 0x0
    db 10010010b
    db 11001111b
    db 0x0
gdt_end:
gdt_descriptor:
    dw gdt_end - gdt_start - 1
    dd gdt_start
CODE_SEG equ gdt_code - gdt_start
DATA_SEG equ gdt_data - gdt_start

MSG_REAL_MODE db "Started in 16-bit Real Mode", 0
MSG_PROT_MODE db "Successfully landed in 32-bit Protected Mode", 0

    times 510-($-$$) db 0
    dw 0xaa55
